if __name__ != "saekit.circuits":
    raise ImportError("this folder is the package saekit.circuits: import it under that name (run python -P)")
