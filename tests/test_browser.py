"""The book as a reader sees it: in JupyterLab, as a map of its own, and as a web site."""

import functools
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import torch

from tripletlib import explore

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, SYSTEM)), None)
MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
if MISSING:
    reason = (
        f"a browser needs {', '.join(MISSING)}: pip install --group browser (pip 25.1 or newer)"
    )
    pytest.skip(reason, allow_module_level=True)
if CHROMIUM is None:
    pytest.skip(
        "there is no Chromium: on Debian, apt-get install chromium", allow_module_level=True
    )

from axe_playwright_python.base import AXE_SCRIPT  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
expect.set_options(timeout=30_000)  # on a busy machine JupyterLab takes its time
WIDE, NARROW = {"width": 1366, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    """Start a Chromium that reaches this machine only."""
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*alone, *["--no-sandbox"] * IS_ROOT]
        )
        yield browser
        browser.close()


def listen(page):
    """Return a list that grows by each error of a page and each request that fails or leaves it."""
    faults = []

    def look_at(request):
        if not re.match(r"(file|data|blob|about):|(http|ws)://127\.0\.0\.1[:/]", request.url):
            faults.append(f"asks for {request.url}")

    page.on("request", look_at)
    page.on("requestfailed", lambda request: faults.append(f"did not get {request.url[:200]}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(f"says {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    return faults


NAMES_AND_CONTRAST = [
    *("aria-command-name", "aria-input-field-name", "aria-toggle-field-name", "button-name"),
    *("color-contrast", "document-title", "frame-title", "html-has-lang", "image-alt"),
    *("input-button-name", "label", "link-name", "role-img-alt", "select-name", "summary-name"),
]


# A chapter's code has thousands of words in a dozen colours: one of each, and of each background.
THIN_OUT = """() => {
    const seen = new Set();
    for (const word of document.querySelectorAll("pre span")) {
        const look = `${word.className} in ${word.closest("div").className}`;
        if (seen.has(look)) word.replaceWith(...word.childNodes);
        seen.add(look);
    }
}"""


def axe(page):
    """Return what axe-core finds wrong with contrasts and names."""
    page.evaluate(THIN_OUT)
    page.evaluate(AXE_SCRIPT)
    options = {"runOnly": NAMES_AND_CONTRAST, "resultTypes": ["violations"]}
    found = page.evaluate("options => axe.run(options)", options)["violations"]
    return [(rule["id"], node["html"][:200]) for rule in found for node in rule["nodes"]]


def too_wide(page):
    return page.evaluate(
        "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )


# ---- JupyterLab --------------------------------------------------------------------------------


def git(folder, *command):
    made = subprocess.run(
        ["git", "-C", folder, *command], check=True, capture_output=True, encoding="utf-8"
    )
    return made.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Commit the files of the work tree, as they are, to a repository of their own."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("what a save changes is seen in a git repository only")
    folder = tmp_path_factory.mktemp("clone")
    for name in git(ROOT, "ls-files", "-z", "-co", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for notebook in (folder / "notebooks").glob("*.ipynb"):
        # Of another Python, JupyterLab would note the version, and a page be unsaved when opened.
        book = notebook.read_text(encoding="utf-8")
        of_page = nbformat.reads(book, as_version=4).metadata.language_info.version
        book = book.replace(f'"version": "{of_page}"', f'"version": "{platform.python_version()}"')
        notebook.write_text(book, encoding="utf-8", newline="\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    me = ("-c", "user.name=reader", "-c", "user.email=reader@localhost")
    git(folder, *me, "commit", "-q", "--no-gpg-sign", "-m", "as it is")
    return folder


SETTINGS = {
    # All cells are on the page at once, so that a test sees them.
    "notebook-extension/tracker": {"windowingMode": "none"},
    # No question about news.
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def lab(clone, tmp_path_factory):
    """Start JupyterLab as the README does, and give its address for a chapter."""
    if find_spec("jupyterlab") is None:
        pytest.skip("JupyterLab is not installed")
    own = tmp_path_factory.mktemp("jupyter")
    for name, setting in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(setting), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    paths = [str(clone), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRIPLETLIB_CACHE": str(own / "cache"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        **{f"JUPYTER_{kind}_DIR": str(own / kind) for kind in ("CONFIG", "DATA", "RUNTIME")},
    }
    command = [sys.executable, "-m", "jupyterlab", "notebooks/01_data.ipynb", "--no-browser"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    with (own / "log").open("w") as log:
        server = subprocess.Popen(
            command + ["--allow-root"] * IS_ROOT,
            cwd=clone,
            env=surroundings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, own / "log")
            yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token={token}&reset"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(address, server, log):
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def tab(browser):
    with browser.new_context(viewport=WIDE) as context:
        yield context.new_page()


CURRENT = ".lm-DockPanel .lm-TabBar-tab.lm-mod-current"


def shown(tab):
    return tab.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def open_in(tab, address):
    """Open a notebook in JupyterLab, and wait until its kernel is ready."""
    tab.goto(address)
    shown(tab).locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    wait_until_idle(tab)
    return shown(tab)


def wait_until_idle(tab, seconds=60):
    idle = tab.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
    idle.wait_for(timeout=1000 * seconds)


def save(tab, clone):
    """Save, and give what git then sees, when both files of a chapter are written."""
    before = time.time_ns()
    tab.keyboard.press("ControlOrMeta+s")
    expect(tab.locator(".lm-DockPanel .lm-TabBar-tab.jp-mod-dirty")).to_have_count(0)
    name = tab.locator(f"{CURRENT} .lm-TabBar-tabLabel").inner_text()
    files = [clone / "notebooks" / name]
    files += [files[0].with_suffix(".py")] if files[0].with_suffix(".py").exists() else []
    for _ in range(100):
        if all(file.stat().st_mtime_ns > before for file in files):
            break
        tab.wait_for_timeout(200)
    else:
        raise AssertionError(f"{name} was not saved")
    tab.wait_for_timeout(500)
    return git(clone, "status", "--porcelain")


def run_all(tab, seconds):
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    waiting = shown(tab).locator(".jp-InputPrompt", has_text="[*]:")
    tab.wait_for_timeout(500)
    expect(waiting).to_have_count(0, timeout=1000 * seconds)
    wait_until_idle(tab, seconds)  # of folded cells no number is seen


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_opens_gives_no_answer_away_and_a_save_changes_nothing(chapter, lab, tab, clone):
    book = open_in(tab, lab(chapter.name))
    cells = nbformat.read(chapter, as_version=4).cells
    expect(book.locator(".jp-Cell")).to_have_count(len(cells))
    expect(tab.locator(".jp-Dialog")).to_have_count(0)
    expect(tab.locator(".lm-DockPanel .lm-TabBar-tab.jp-mod-dirty")).to_have_count(0)
    solutions = [i for i, cell in enumerate(cells) if cell.source.startswith("# Solution")]
    assert solutions
    for number, at in enumerate(solutions, start=1):
        cell = book.locator(".jp-Cell").nth(at)
        expect(cell.locator(".jp-PlaceholderText")).to_have_text(f"# Solution {number}")
        expect(cell.locator(".cm-content")).to_be_hidden()
        expect(cell.locator(".jp-OutputArea-output")).to_have_count(0)
    expect(book.locator("details").first).to_be_attached()
    expect(book.locator("details[open]")).to_have_count(0)
    assert save(tab, clone) == ""


def test_links_open_the_next_chapter_the_one_before_and_the_glossary(lab, tab):
    open_in(tab, lab("01_data.ipynb"))
    current = tab.locator(f"{CURRENT} .lm-TabBar-tabLabel")
    for link, title in (("2 · Triplets", "02_triplets.ipynb"), ("1 · Data", "01_data.ipynb")):
        shown(tab).get_by_role("link", name=link).first.click()
        expect(current).to_have_text(title, timeout=30_000)
        shown(tab).locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=30_000)
    shown(tab).get_by_role("link", name="glossary").first.click()
    expect(current).to_have_text("glossary.md", timeout=30_000)


def test_the_first_chapter_runs_whole_by_the_menu(lab, tab, clone):
    book = open_in(tab, lab("01_data.ipynb"))
    run_all(tab, seconds=300)
    for kind in ("error", "stderr"):
        expect(book.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]')).to_have_count(0)
    changed = save(tab, clone).split()[1::2]
    # Nothing but outputs that differ, and the version of this Python.
    before, after = (
        nbformat.read(folder / "notebooks" / "01_data.ipynb", as_version=4)
        for folder in (ROOT, clone)
    )
    for one in (before, after):
        one.metadata.language_info.version = None
        for cell in one.cells:
            cell.outputs = [] if cell.cell_type == "code" else None
    assert after == before
    assert changed in ([], ["notebooks/01_data.ipynb"])


# ---- The map -----------------------------------------------------------------------------------

WORDS = ["<b>even</b>", "odd"]


@functools.cache
def small_map():
    """Twenty-five images on a grid; that in the middle, of the first class, is number 12."""
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    images = torch.rand(25, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    points = torch.stack([columns, rows], dim=-1).flatten(0, 1)
    return explore(points, images, torch.arange(25) % 2, k=4, names=WORDS)


@pytest.fixture
def on_map(browser, tmp_path):
    small_map().save(tmp_path / "map.html")
    with browser.new_context(viewport=WIDE) as context:
        page = context.new_page()
        faults = listen(page)
        page.goto((tmp_path / "map.html").as_uri())
        page.locator(".map canvas").wait_for()
        page.wait_for_timeout(300)
        yield page
        assert faults == []


def place(page, across=0.5, down=0.5):
    """Return where a part of the map is on the screen."""
    box = page.locator(".map canvas").bounding_box()
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def point_at(page, *where):
    page.mouse.move(*place(page, 0.02, 0.02))
    page.mouse.move(*place(page, *where))


def picture(page):
    page.wait_for_timeout(150)
    return page.locator(".map canvas").evaluate("map => map.toDataURL()")


def test_pointing_shows_an_image_and_its_neighbours(on_map):
    before = picture(on_map)
    expect(on_map.locator(".what")).to_have_text("No image is pointed at")
    point_at(on_map)
    expect(on_map.locator(".what")).to_have_text("<b>even</b> (image 12)")
    expect(on_map.get_by_text("Nearest on the map:")).to_be_visible()
    found = on_map.locator(".neighbours button")
    labels = [button.get_attribute("aria-label") for button in found.all()]
    assert labels == [f"odd, image {other}, another class" for other in (7, 11, 13, 17)]
    # The image itself, and not an empty square.
    shades = on_map.locator(".image").evaluate(
        "one => new Set(one.getContext('2d').getImageData(0, 0, 8, 8).data).size"
    )
    assert shades > 8
    assert picture(on_map) != before


def test_a_click_keeps_an_image_until_the_next_and_neighbours_lead_on(on_map):
    on_map.mouse.click(*place(on_map))
    point_at(on_map, 0.5, 0.95)
    expect(on_map.locator(".what")).to_have_text("<b>even</b> (image 12)")
    on_map.locator(".neighbours button").first.click()
    expect(on_map.locator(".what")).to_have_text("odd (image 7)")
    status = "Image 7: odd. Nearest on the map: "
    expect(on_map.get_by_role("status")).to_contain_text(status)
    on_map.mouse.click(*place(on_map, 0.02, 0.5))
    expect(on_map.locator(".what")).to_have_text("No image is pointed at")


def test_a_class_that_is_picked_stands_out(on_map):
    before = picture(on_map)
    even, odd = (on_map.get_by_role("button", name=f"{name} (") for name in WORDS)
    expect(even).to_have_text("<b>even</b> (13)")
    odd.click()
    expect(odd).to_have_attribute("aria-pressed", "true")
    expect(even).to_have_attribute("aria-pressed", "false")
    assert picture(on_map) != before
    point_at(on_map)  # what has stepped back is not found
    expect(on_map.locator(".what")).to_have_text("No image is pointed at")
    odd.click()
    expect(odd).to_have_attribute("aria-pressed", "false")
    point_at(on_map)
    expect(on_map.locator(".what")).to_have_text("<b>even</b> (image 12)")


@pytest.mark.parametrize("way", ["button", "wheel", "key"])
def test_it_zooms_by_button_wheel_and_key_and_goes_back(on_map, way):
    whole = picture(on_map)
    if way == "button":
        on_map.get_by_role("button", name="Zoom in").click()
    elif way == "wheel":
        on_map.mouse.move(*place(on_map, 0.02, 0.5))
        on_map.mouse.wheel(0, -200)
        assert picture(on_map) == whole, "before a click the wheel is the page's"
        on_map.mouse.click(*place(on_map, 0.02, 0.5))
        on_map.mouse.wheel(0, -200)
    else:
        on_map.locator(".map canvas").press("+")
    assert picture(on_map) != whole
    point_at(on_map)  # the middle stays
    expect(on_map.locator(".what")).to_have_text(re.compile(r"image 1[0-4]\)"))
    on_map.keyboard.press("Escape")
    on_map.get_by_role("button", name="All").click()
    on_map.mouse.move(*place(on_map, 0.02, 0.02))
    on_map.locator(".map canvas").press("Escape")
    assert picture(on_map) == whole


def test_it_is_dragged(on_map):
    point_at(on_map)
    x, y = place(on_map)
    on_map.mouse.down()
    on_map.mouse.move(x + 60, y + 40, steps=4)
    on_map.mouse.up()
    on_map.locator(".map canvas").press("Escape")
    on_map.mouse.move(x, y)
    expect(on_map.locator(".what")).to_have_text("No image is pointed at")
    on_map.mouse.move(x + 60, y + 40)
    expect(on_map.locator(".what")).to_have_text("<b>even</b> (image 12)")


def test_the_keys_alone_do_it_all(on_map):
    on_map.keyboard.press("Tab")
    expect(on_map.get_by_role("application")).to_be_focused()
    on_map.keyboard.press("ArrowRight")
    expect(on_map.locator(".what")).to_contain_text("(image 12)")
    for key, image in {"ArrowRight": 13, "ArrowUp": 18, "ArrowLeft": 17, "ArrowDown": 12}.items():
        on_map.keyboard.press(key)
        expect(on_map.locator(".what")).to_contain_text(f"(image {image})")
    names = []
    for _ in range(9):
        on_map.keyboard.press("Tab")
        focused = "document.activeElement.shadowRoot.activeElement.textContent"
        names.append(on_map.evaluate(focused))
    assert names == ["+", "\N{MINUS SIGN}", "All", *["odd"] * 4, "<b>even</b> (13)", "odd (12)"]
    on_map.keyboard.press("Enter")
    pressed = on_map.locator(".classes button").last
    expect(pressed).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("view", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits_its_window_and_can_be_read(on_map, view):
    on_map.set_viewport_size(view)
    on_map.mouse.click(*place(on_map))
    expect(on_map.locator(".what")).to_contain_text("(image 12)")
    on_map.locator(".classes button").first.click()
    assert not too_wide(on_map)
    assert axe(on_map) == []


def test_without_scripts_there_is_a_picture(browser, tmp_path):
    small_map().save(tmp_path / "map.html")
    with browser.new_context(viewport=WIDE, java_script_enabled=False) as context:
        page = context.new_page()
        page.goto((tmp_path / "map.html").as_uri())
        still = page.get_by_role("img", name="Map of 25 images in 2 classes")
        assert still.bounding_box()["width"] == 700


def test_in_jupyterlab_the_map_hears_the_mouse_and_keys_stay_its_own(lab, tab, clone):
    (clone / ".git" / "info" / "exclude").write_text("map.ipynb\n", encoding="utf-8")
    source = (
        "import torch\nfrom tripletlib import explore\n"
        "points = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))\n"
        "explore(points, torch.rand(25, 1, 8, 8), torch.arange(25) % 2)"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    book.metadata.kernelspec = nbformat.read(CHAPTERS[0], as_version=4).metadata.kernelspec
    nbformat.write(book, clone / "notebooks" / "map.ipynb")
    open_in(tab, lab("map.ipynb"))
    run_all(tab, seconds=60)
    tab.locator(".map canvas").wait_for(timeout=10_000)
    tab.locator(".map canvas").scroll_into_view_if_needed()
    point_at(tab)
    expect(tab.locator(".what")).to_have_text("0 (image 12)")
    expect(tab.locator(".neighbours button")).to_have_count(8)
    tab.mouse.click(*place(tab))
    for key in ("0", "0", "d", "d", "ArrowUp"):  # with 0 0 it would restart, with d d delete
        tab.keyboard.press(key)
    expect(tab.locator(".what")).to_have_text("1 (image 13)")
    expect(tab.locator(".jp-Dialog")).to_have_count(0)
    expect(shown(tab).locator(".jp-CodeCell")).to_have_count(1)
    save(tab, clone)


# ---- The site ----------------------------------------------------------------------------------


def test_every_page_of_the_site_fits_fetches_nothing_and_can_be_read(browser, site):
    pages = sorted(file for file in site.rglob("*.html") if "_static" not in file.parts)
    assert len(pages) > len(CHAPTERS)
    wrong = {}
    with browser.new_context(viewport=WIDE) as context:
        for file in pages:
            page = context.new_page()
            faults = listen(page)
            page.goto(file.as_uri())
            for view in (NARROW, WIDE):
                page.set_viewport_size(view)
                faults += [f"it scrolls sideways at {view['width']}"] * too_wide(page)
            faults += axe(page)
            page.close()
            if faults:
                wrong[file.relative_to(site).as_posix()] = faults
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_map_of_a_chapter_hears_the_mouse_on_the_site(browser, site):
    (chapter,) = (c for c in CHAPTERS if "\nexplore(" in c.with_suffix(".py").read_text("utf-8"))
    with browser.new_context(viewport=WIDE) as context:
        page = context.new_page()
        faults = listen(page)
        page.goto((site / "notebooks" / f"{chapter.stem}.html").as_uri())
        page.locator(".map canvas").scroll_into_view_if_needed()
        before = picture(page)
        page.locator(".map canvas").press("ArrowRight")
        expect(page.locator(".what")).to_contain_text("(image ")
        expect(page.locator(".neighbours button")).to_have_count(8)
        page.get_by_role("button", name="Zoom in").click()
        assert picture(page) != before
        on_the_map = page.locator(".what").inner_text()
        page.locator(".neighbours button").first.click()
        expect(page.locator(".what")).not_to_have_text(on_the_map)
        assert faults == []
