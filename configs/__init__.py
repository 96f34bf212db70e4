"""Experiments, one file each: `get_config(arg) -> ConfigDict`. `common` holds what they share."""
