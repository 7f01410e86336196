"""One step against what people would use instead: sets, arms, the matrix of runs, and what is drawn from it."""
