"""Token transforms: which rows of the residual stream go on."""
