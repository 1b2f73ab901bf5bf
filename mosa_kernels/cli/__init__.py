"""The command `mosa-kernels`. Each subcommand is a function in the module of its own name."""
