if __name__ != "saekit.kernels":
    raise ImportError("this folder is the package saekit.kernels: import it under that name (run python -P)")
