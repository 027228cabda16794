"""`pst info`: what is installed and what will run where."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def info(as_json: bool) -> None:
    """Versions, devices, and which backend the operations will use here."""
    import json
    import os

    import torch

    from ..formats.folder import TOOL
    from ..formats.manifest import package_version, versions
    from ..inference.choice import describe
    from ..methods.base import method_names
    from ..ops.dispatch import have_triton
    from .console import print_table, size

    facts = {TOOL: package_version(TOOL, "unknown"), **versions()}
    for extra in ("datasets", "lm-eval", "matplotlib"):
        facts[extra] = package_version(extra, "not installed")
    facts["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}, {size(properties.total_memory)}"
    else:
        facts["gpu"] = "none that torch can use"
    facts["operations on cuda tensors"] = "triton" if have_triton() else "plain torch: install triton for speed"
    facts["operations on cpu tensors"] = "plain torch"
    facts |= describe(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    facts["methods"] = ", ".join(method_names())
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        print_table("pst info", ("", "value"), list(facts.items()))
