"""inspect: what an adapter or a checkpoint holds, and what a folder of them has."""
