if __name__ != "saekit.trainers":
    raise ImportError("this folder is the package saekit.trainers: import it under that name (run python -P)")
