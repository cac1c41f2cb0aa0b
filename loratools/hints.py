"""Hints that several readers give: what a person can do about a file that is damaged."""

# For a file of any kind.
DAMAGED = "the file is damaged or was not written to the end; download or save it again"
# For an adapter whose file can be opened, and whose tensors do not make an adapter.
DAMAGED_ADAPTER = "save the adapter again, or download it again if it was cut off"
