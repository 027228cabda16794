"""Running a pruned model: linear layers that keep 9/16 of the bytes and choose the fastest way to multiply."""
