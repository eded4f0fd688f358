"""How good pictures are: ShapeEval, the comparison of methods, scores, intervals."""
