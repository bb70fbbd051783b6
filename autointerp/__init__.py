if __name__ != "saekit.autointerp":
    raise ImportError(
        "this folder is the package saekit.autointerp: import it under that name (run python -P)"
    )
