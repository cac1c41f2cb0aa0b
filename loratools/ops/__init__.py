"""The verbs: one room is one verb, and rooms for what two verbs share."""
