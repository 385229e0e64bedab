"""The user's network, handled without leaving a trace: names, inputs, copies, isolation, precision."""
