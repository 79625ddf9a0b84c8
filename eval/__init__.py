"""Scores of trained towers: entries that read data, run a model and write results.

Not here: what training needs too (the library has it), and anything that trains.
"""
