"""The style sheet of the page: one column, the reader's own light or dark, no font or file from elsewhere."""

from __future__ import annotations

from .charts import COLORS

# The same hues, lighter, for dark screens.
DARK_COLORS = ("#5ab4f0", "#ff9150", "#35cfa0", "#e79ac8", "#e5b545", "#9ad0f5")

_LIGHT = "--paper:#fff;--ink:#1c2126;--muted:#5a646e;--faint:#e3e7ea;--soft:#f4f6f7;"
_DARK = "--paper:#14181c;--ink:#e6e9ec;--muted:#9aa5af;--faint:#2d343b;--soft:#1d2329;"


def _variables(base: str, colors: tuple[str, ...]) -> str:
    return base + "".join(f"--c{index}:{color};" for index, color in enumerate(colors))


STYLE = (
    f"""
:root{{color-scheme:light dark;{_variables(_LIGHT, COLORS)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK, DARK_COLORS)}}}}}
@media print{{:root{{{_variables(_LIGHT, COLORS)}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:880px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:3rem 0 .4rem;padding-top:1rem;border-top:1px solid var(--faint);overflow-wrap:anywhere}
h3,h2.part{font-size:1.05rem;margin:2rem 0 .4rem;padding:0;border:0}
p{margin:.4rem 0;max-width:44rem}
.lead{font-size:1.05rem}
.muted,figcaption,footer{color:var(--muted);font-size:.9rem}
a{color:var(--c0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:1.2rem 0;padding:0}
.tiles div{background:var(--soft);border-radius:6px;padding:10px 12px}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums;line-height:1.3}
.tiles small{display:block;color:var(--muted);font-size:.8rem}
.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint)}
th{font-weight:600;color:var(--muted);vertical-align:bottom}
td.n,th.n{text-align:right}
td.n{white-space:nowrap}
td.name{min-width:8rem;overflow-wrap:anywhere}
figure{margin:1rem 0 1.6rem}
figure .wide{margin:0}
svg{display:block;max-width:100%;min-width:560px;height:auto;font-size:12px}
svg text{fill:var(--ink)}
svg .tick,svg .name{fill:var(--muted);font-variant-numeric:tabular-nums}
svg .label,svg .value{font-weight:600;font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--faint)}
svg .axis{stroke:var(--muted)}
svg .level{stroke:var(--ink);stroke-dasharray:5 4}
svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}
svg polyline.thin{stroke-width:1}
svg polyline.faint{stroke-width:1;opacity:.35}
svg .on-light{fill:#10151a;font-size:11px}
svg .on-dark{fill:#fff;font-size:11px}
code,pre{font:.88rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--soft);border-radius:6px;padding:12px;overflow-x:auto;margin:.6rem 0}
pre.line{white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--c0);font-weight:600}
footer{margin-top:3rem}
"""
    + "".join(
        f"svg polyline.c{index}{{stroke:var(--c{index})}}svg rect.c{index},svg circle.c{index},svg text.c{index}{{fill:var(--c{index})}}\n"
        for index in range(len(COLORS))
    )
)
