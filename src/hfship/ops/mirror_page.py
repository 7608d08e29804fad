# SPDX-License-Identifier: Apache-2.0
"""What the mirror shows to people: its models, and how to use them; or how to get in. Pure.

Never: shows a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Mapping, Sequence

from hfship.base.text import counted, human_bytes
from hfship.ops.page import as_text, page_text

if TYPE_CHECKING:
    from hfship.ops.mirror_repo import MirrorRepo

_HEAD = (
    '<tr><th>Model</th><th>Commit</th><th class="number">Size</th><th class="number">Files</th>'
    "<th>Licence</th><th>Fetched</th></tr>"
)


def overview_page(
    url: str,
    repos: Sequence[MirrorRepo],
    left_out: Mapping[str, str],
    wants_token: bool,
    is_complete: bool,
) -> str:
    """The whole page. `url`: as the browser reached the mirror."""
    size = sum(repo.size for repo in repos)
    about = f"{counted(len(repos), 'repository')}, {human_bytes(size)}"
    about = about.replace("repositorys", "repositories")
    if not is_complete:
        about += "; still looking through the folder"
    parts = [
        *_table(repos),
        *_usage(url, repos, wants_token),
        *_left_out(left_out),
    ]
    return page_text(f"Models at {url}", f"A private, read-only Hub: {about}.", parts)


def login_page(url: str) -> str:
    """What a browser gets that brought no token, or a wrong one; nothing of the models is in it."""
    parts = [
        "<p>Load this page again: your browser asks for a user name, which may be anything, and a "
        "password, which is the token. Whoever runs this mirror has it.</p>",
    ]
    if url.startswith("http://"):
        parts.append("<p>The way here is not encrypted: others on it could read the token.</p>")
    parts += _usage(url, [], True)
    about = "A private, read-only Hub, for those who have its token."
    return page_text(f"Models at {url}", about, parts)


def _table(repos: Sequence[MirrorRepo]) -> List[str]:
    if not repos:
        return ["<p>No whole model is here yet. New ones appear by themselves.</p>"]

    lines = ['<div class="wide"><table>', _HEAD]
    for repo in repos:
        lines.append(_row(repo))
    lines.append("</table></div>")
    return lines


def _row(repo: MirrorRepo) -> str:
    source = repo.source
    name = repo.repo
    if source.repo_type != "model":
        name += f" ({source.repo_type})"
    commit = as_text(repo.commit)
    cells = [
        f'<td class="name">{as_text(name)}</td>',
        f'<td><code title="{commit}">{commit[:12]}</code></td>',
        f'<td class="number">{human_bytes(repo.size)}</td>',
        f'<td class="number">{len(repo.files)}</td>',
        f"<td>{as_text(source.license or '')}</td>",
        f"<td>{as_text(source.fetched_at[:10])}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _usage(url: str, repos: Sequence[MirrorRepo], wants_token: bool) -> List[str]:
    """How to use it, with the name of a model that is here."""
    name = "ORG/NAME"
    for repo in repos:
        if repo.source.repo_type == "model":
            name = repo.repo
            break

    settings = [f"export HF_ENDPOINT={url}"]
    if wants_token:
        settings.append("export HF_TOKEN=...     # this mirror asks for a token")
    commands = [
        *settings,
        f"hf download {name}",
        f"vllm serve {name}     # and transformers, and all else that uses huggingface_hub",
        f"hfship fetch {name}     # resumes, and proves every file",
    ]
    return ["<h2>How to use it</h2>", f"<pre>{as_text(chr(10).join(commands))}</pre>"]


def _left_out(left_out: Mapping[str, str]) -> List[str]:
    if not left_out:
        return []
    lines = ["<h2>Not served</h2>", "<ul>"]
    for why in left_out.values():
        lines.append(f"<li>{as_text(why)}</li>")
    lines.append("</ul>")
    return lines
