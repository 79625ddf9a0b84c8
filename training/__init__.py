"""Text-supervised training of CLIP models from shards.

`main` is the entry. Not here: what evaluation needs too (the library has it).
"""
