"""What `driftrec analyse` measures on the trained models of a finished comparison."""
