"""The judgement: observed error over what rounding the operands must cost, call by call and as a whole."""
