"""The runs of an audit: in the mode, in true FP64, and in FP64 disturbed, with every module call recorded."""
