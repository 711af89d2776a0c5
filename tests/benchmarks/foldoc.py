"""The articles of Debian's dict-foldoc (the Free On-line Dictionary of Computing) as one text, headings as in WikiText.

apt-get download dict-foldoc && dpkg -x dict-foldoc_*.deb foldoc
python tests/benchmarks/foldoc.py foldoc/usr/share/dictd/foldoc.dict.dz wiki.txt
"""

import gzip
import re
import sys
from pathlib import Path

source, target = sys.argv[1:]
articles = []
for article in re.split(r"\n(?=\S)", gzip.open(source).read().decode("utf-8", "replace")):
    head, *lines = article.split("\n")
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines))
    paragraphs = [" ".join(re.sub(r"[{}]|<[^>]*> ?", "", p).split()) for p in paragraphs]
    paragraphs = [p for p in paragraphs if p and not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", p)]
    if sum(map(len, paragraphs)) > 200:
        articles.append(f" = {head.strip()} = \n\n" + "".join(f" {p} \n" for p in paragraphs))
Path(target).write_text("\n".join(articles), encoding="utf-8")
print(f"{target}: {len(articles):,} articles")
