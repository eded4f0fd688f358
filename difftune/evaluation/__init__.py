"""How good pictures are: ShapeEval, the comparison of guidance methods, scores of files, and the statistics of such
numbers (confidence intervals, win rates).
"""
