"""Data: texts by name or from files, and the token ids cut out of them."""
