"""The cells: one file a family, with its equations, parameters, step and derivative."""
