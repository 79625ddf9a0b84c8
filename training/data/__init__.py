"""Bytes to batches; knows no trainer, and rank and world come in as numbers.

`sources` finds shards and counts samples, `samples` makes picture and caption of a shard's record
and counts what fails, `batches` shuffles, transforms and collates.
"""
