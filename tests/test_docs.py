"The site can be built: every notebook survives nbdev's processing, and no link inside the site leads nowhere."
import subprocess
import sys
from pathlib import Path

import check_docs
import pytest
from check_docs import Page, broken_links, slug
from test_notebooks import environment

ROOT = Path(check_docs.__file__).resolve().parents[1]
CFG = dict(git_url='https://github.com/someone/tpa_nb', branch='main', doc_host='https://someone.github.io',
           doc_baseurl='/tpa_nb')


def broken(text, root):
    "Broken links of a page that holds `text`, in a site with one other page"
    pages = [Page('00_here.ipynb', 'here.html', text, ''),
             Page('01_there.ipynb', 'there.html', '## Two words\n\n### there.method\n', '')]
    (root/'nbs').mkdir(exist_ok=True)
    return [o.removeprefix('00_here.ipynb: ') for o in broken_links(pages, CFG, root)]


@pytest.mark.parametrize('link', ['01_there.ipynb', '01_there.ipynb#two-words', 'there.html#there.method',
                                  'https://someone.github.io/tpa_nb/there.html#there.method', 'https://example.org/x'])
def test_good_links(link, tmp_path): assert broken(f'See [it]({link}).', tmp_path) == []


@pytest.mark.parametrize('link, what', [
    ('02_gone.ipynb', 'page or file'), ('x.png', 'page or file'), ('01_there.ipynb#gone', 'anchor'),
    ('#nowhere', 'anchor'),
    ('https://someone.github.io/tpa_nb/there.html#gone', 'anchor'),
    ('https://github.com/someone/tpa_nb/blob/main/gone.py', 'file')])
def test_broken_links(link, what, tmp_path): assert broken(f'See [it]({link}).', tmp_path) == [f'no {what} {link}']


def test_links_inside_code_are_left_alone(tmp_path):
    assert broken('`[x](gone.html)`\n\n```\n[x](gone.html)\n```', tmp_path) == []


@pytest.mark.parametrize('heading, expected', [
    ('What goes in', 'what-goes-in'), ('`head_gates`', 'head_gates'), ('Arch.clone', 'arch.clone'),
    ('1. First!', 'first'),
    ('On a GPU, *later*', 'on-a-gpu-later'), ('See [x](y)', 'see-x'), ('A {#own}', 'own')])
def test_slug(heading, expected): assert slug(heading) == expected


def test_site():
    "In a process of its own, because the processing imports the package and changes the folder"
    done = subprocess.run([sys.executable, check_docs.__file__], cwd=ROOT, env=environment([]), capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
