if __name__ != "trellis_ts.kernels":
    raise ImportError("this folder is trellis_ts.kernels; take the checkout root off sys.path")
