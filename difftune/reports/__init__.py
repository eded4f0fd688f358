"""How results look: figures, labelled pictures and HTML pages of one style."""
