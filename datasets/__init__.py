if __name__ != "trellis_ts.datasets":
    raise ImportError("this folder is trellis_ts.datasets; take the checkout root off sys.path")
