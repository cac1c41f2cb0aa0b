"""What the kinds of update share: the protocol, the forms of a delta, and the readers of stored parts."""
