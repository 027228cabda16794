"""Measurements that anyone can repeat: `pst bench`. One file a measurement, each with a frozen dataclass of its settings."""
