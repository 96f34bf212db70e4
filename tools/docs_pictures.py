"""The README's pictures (docs/pictures/): a page of explain's and a table of a report's, on images that our code draws.

python -m tools.quickstart --out=quickstart_out
python -m tools.docs_pictures quickstart_out docs/pictures       (chromium on the PATH, or $PALIGEMMA_MED_CHROMIUM)
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from paligemma_med.pp import images

# Right, and not read from the image, which is what the page is for.
QUESTION = "Does the picture contain the liver?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=pathlib.Path, help="what tools.quickstart wrote")
    parser.add_argument("out", type=pathlib.Path, help="folder of explain.png and report.png")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = args.quickstart / "stage2"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        page = folder / "page.html"
        question = [f"--image={args.quickstart / 'example.jpg'}", f"--question={QUESTION}"]
        _call("paligemma_med.explain", f"--workdir={run}", *question, f"--out={page}")
        _shoot(page, (1100, 880), args.out / "explain.png")
        _call("tools.report", run, f"--out={folder / 'report'}")
        table = folder / "table.html"
        table.write_text(first_table((folder / "report" / "report.html").read_text("utf-8")), "utf-8")
        _shoot(table, (1040, 615), args.out / "report.png")


def first_table(report: str) -> str:
    """A report's page with nothing on it but the table of its first evaluation, beside the controls."""
    sections = re.findall(r"<h2 .*?(?=<h2 |</main>)", report, re.DOTALL)
    tables = [re.match(r".*?</table>\s*</div>", x, re.DOTALL) for x in sections if ">exact match, %<" in x]
    if not tables or not tables[0]:
        raise ValueError("the report has no section with a table of exact matches; its layout has changed.")
    head = report[: report.index("<body>")] + "<style>h2 { margin-top: 0 }</style>"
    return f"{head}<body><main>{tables[0][0]}</main></body></html>"


def _call(module, *args):
    subprocess.run([sys.executable, "-m", module, *map(str, args)], check=True)


def _shoot(page, size, target):
    """A picture of a page's top, in 128 colours for the bytes."""
    chromium = os.environ.get("PALIGEMMA_MED_CHROMIUM", "chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size[0]},{size[1]}"]
    command = [chromium, *flags, f"--screenshot={target}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    with images.open_image(target.read_bytes()) as picture:
        picture.convert("RGB").quantize(128).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
