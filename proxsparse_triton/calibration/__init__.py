"""Text in, token windows out: `files`, `folders` and `hub` read text, `sources` names it, `tokens`, `pool` and `windows` tokenise,
cut and draw it.

Nothing is re-exported: importing this package costs nothing, `sources` no torch.
"""
