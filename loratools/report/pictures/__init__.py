"""Charts in a terminal, in colour or in characters; where nobody looks at a terminal, nothing is drawn."""
