"""Images and dense features to segmentation scores.

`protocol` says how a score is made, `readers` bring pictures and labels, `windows` resizes, slides
and stitches, `engine` puts a tower between them, `decide` makes label maps and `confusion` counts.
Not here: flags, files of results, pictures.
"""
