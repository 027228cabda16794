"""Text in, token windows out: `files` and `hub` read text, `sources` names it, `windows` tokenises, cuts and draws it.

Nothing is re-exported: importing this package costs nothing, `sources` no torch.
"""
