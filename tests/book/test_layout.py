"""Every page fits a screen of 1,280 and one of 390 px, and can be read in light and in dark.

The rules. The page never scrolls sideways, and nothing stands out of its column. At 1,280 px nothing scrolls
by itself either: a line of code of 100 characters has room, formulas and tables are made smaller by book.js.
At 390 px code wraps; a formula or a table that is too wide at its smallest size scrolls in a frame that the
keyboard reaches and a screen reader announces. Text has a contrast of at least 4.5 to 1, large text 3 to 1.
"""

import re
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from book_browser import check_content, in_browser, open_page, soup
from book_build import ROOT, toc_pages, toc_parts

PAGES = toc_pages()
WORKSHOP = toc_parts()["Workshop"]
WIDE, NARROW = 1280, 390

OPEN_ALL = """
document.querySelectorAll('article details').forEach(part => { part.open = true; });
document.querySelectorAll('article .toggle-hidden').forEach(part => part.classList.remove('toggle-hidden'));
"""

# Two frames, in which the page hears of its new size; then book.js waits 100 ms for further news, and fits.
SETTLED = """
const done = arguments[arguments.length - 1];
const frames = (number, then) => requestAnimationFrame(() => number > 1 ? frames(number - 1, then) : then());
frames(2, () => {
    window.dispatchEvent(new Event('resize'));
    setTimeout(() => frames(1, () => done(true)), 120);
});
"""

# What stands out of its column, is cut, or scrolls: [kind, element, pixels, text].
MISFITS = """
const found = [], page = document.documentElement, article = document.querySelector('article');
const style = getComputedStyle(article), around = article.getBoundingClientRect();
const left = around.left + parseFloat(style.paddingLeft), right = around.right - parseFloat(style.paddingRight);
const note = (kind, element, pixels) => found.push(
    [kind, element.tagName.toLowerCase() + '.' + (element.className.baseVal ?? element.className), Math.round(pixels),
     (element.textContent || element.alt || '').trim().replace(/\\s+/g, ' ').slice(0, 60)]);
if (page.scrollWidth > page.clientWidth + 1) note('page', page, page.scrollWidth - page.clientWidth);
for (const element of article.querySelectorAll('*')) {
    if (element.closest('mjx-assistive-mml, .visually-hidden, script, style, svg *, .headerlink, .copybtn, defs')) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || getComputedStyle(element).visibility === 'hidden') continue;
    const framed = element.closest('.scrolls');
    if (framed === element) {
        note('frame', element, element.scrollWidth - element.clientWidth);
        if (element.tabIndex !== 0 || element.getAttribute('role') !== 'region' || !element.getAttribute('aria-label'))
            note('unannounced', element, 0);
    }
    if (framed && framed !== element) continue;
    if (box.right > right + 1.5) note('right', element, box.right - right);
    if (box.left < left - 1.5) note('left', element, left - box.left);
    const hides = getComputedStyle(element).overflowX !== 'visible';
    if (!framed && hides && element.scrollWidth > element.clientWidth + 1 && !element.closest('mjx-container'))
        note('cut', element, element.scrollWidth - element.clientWidth);
}
return found;
"""

# Text whose contrast with its ground is too low: [element, ratio, colour, ground, text].
PALE = """
const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
const channel = v => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const ground = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
        const colour = rgba(getComputedStyle(at).backgroundColor);
        if (colour[3] > 0) layers.push(colour);
        if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const found = [], seen = new Set();
const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || seen.has(element) || element.closest('mjx-assistive-mml, script, style, .visually-hidden, .headerlink')) continue;
    seen.add(element);
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (!box.width || style.visibility === 'hidden') continue;
    const below = ground(element), colour = over(rgba(style.color), below);
    const [low, high] = [light(below), light(colour)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push([element.tagName.toLowerCase() + '.' + element.className,
        Math.round(100 * ratio) / 100, style.color, below.map(Math.round).join(), text.slice(0, 40)]);
}
return found;
"""


def set_width(browser, width: int):
    """A window of this width in CSS pixels, as the page sees it, with everything unfolded and settled."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_script(OPEN_ALL)
    browser.execute_async_script(SETTLED)


def set_theme(browser, name: str):
    """Light or dark, as the button of the theme sets it."""
    browser.execute_script(
        "document.documentElement.dataset.theme = document.documentElement.dataset.mode = arguments[0]",
        name,
    )


def listed(misfits: list) -> str:
    """Misfits for a message, one a line."""
    return "\n".join(" | ".join(map(str, misfit)) for misfit in misfits)


@pytest.fixture
def window(browser):
    """The browser, whose size is its own again afterwards."""
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_browser
@pytest.mark.parametrize("page", PAGES)
def test_page_opened_by_its_path_arrives_whole_fits_and_can_be_read(book, window, page):
    errors, asked = open_page(window, (book.html / f"{page}.html").as_uri())
    assert not errors
    local = {"file", "data", "blob", "chrome"}  # chrome: the browser's own empty tab
    assert {urlsplit(address).scheme for address in asked} <= local
    check_content(window)
    faults = {}
    set_width(window, WIDE)
    faults[f"at {WIDE} px"] = window.execute_script(MISFITS)
    for theme in ("light", "dark"):
        set_theme(window, theme)
        faults[f"contrast, {theme}"] = window.execute_script(PALE)
    set_width(window, NARROW)
    narrow = window.execute_script(MISFITS)
    faults[f"at {NARROW} px"] = [misfit for misfit in narrow if misfit[0] != "frame"]
    assert not any(faults.values()), "\n".join(
        f"{name}:\n{listed(found)}" for name, found in faults.items() if found
    )


WITNESS = """
document.querySelector('article section').insertAdjacentHTML('beforeend', arguments[0]);
"""


@in_browser
@pytest.mark.parametrize(
    ("html", "kind"),
    [
        ("<div style='width: 2000px'>wide</div>", "right"),
        ("<div style='margin-left: -40px'>out on the left</div>", "left"),
        ("<div style='overflow-x: hidden'><pre style='width: 900px'>cut</pre></div>", "cut"),
        ("<div class='scrolls' style='height: 9px'>nobody is told</div>", "unannounced"),
    ],
)
def test_the_rules_catch_what_does_not_fit(book, window, html, kind):
    open_page(window, (book.html / "nbs/references.html").as_uri())
    window.execute_script(WITNESS, html)
    set_width(window, WIDE)
    assert kind in {misfit[0] for misfit in window.execute_script(MISFITS)}


@in_browser
def test_the_rules_catch_pale_text(book, window):
    open_page(window, (book.html / "nbs/references.html").as_uri())
    set_theme(window, "dark")
    window.execute_script(WITNESS, "<p style='color: #555; background: #222'>pale</p>")
    assert [misfit[-1] for misfit in window.execute_script(PALE)] == ["pale"]


@in_browser
def test_a_wide_table_is_made_smaller_and_then_scrolls_in_an_announced_frame(book, window):
    open_page(window, (book.html / "nbs/references.html").as_uri())
    cells = "".join(f"<td>column {number}</td>" for number in range(10))
    window.execute_script(WITNESS, f"<div><table id='probe'><tr>{cells}</tr></table></div>")
    state = """const t = document.getElementById('probe'), b = t.parentElement;
        return [t.className, b.classList.contains('scrolls'), b.getAttribute('aria-label')]"""
    set_width(window, 2400)
    assert window.execute_script(state) == ["", False, None]
    set_width(window, NARROW)
    assert window.execute_script(state) == ["fit-2", True, "Table: scrolls sideways"]
    assert not [misfit for misfit in window.execute_script(MISFITS) if misfit[0] != "frame"]


@in_browser
def test_a_line_of_code_of_100_characters_has_room_at_1280(book, window):
    open_page(window, (book.html / "nbs/index.html").as_uri())
    set_width(window, WIDE)
    room = window.execute_script("""
        const pre = document.querySelector('article div.highlight pre'), style = getComputedStyle(pre);
        const probe = document.createElement('span');
        probe.textContent = 'm'.repeat(100);
        probe.style.whiteSpace = 'pre';
        pre.append(probe);
        return pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - probe.getBoundingClientRect().width;
    """)
    assert room >= 0


@in_browser
@pytest.mark.parametrize("page", ["nbs/index", "nbs/00_why_two_stages", "nbs/12_first_results"])
def test_figures_are_no_pale_boxes_in_the_dark(book, window, page):
    """The lightness of a figure is turned over and its ground becomes the page's; captions are as dark as text."""
    open_page(window, (book.html / f"{page}.html").as_uri())
    set_width(window, WIDE)
    set_theme(window, "dark")
    seen = window.execute_script("""
        const text = getComputedStyle(document.querySelector('article p')).color;
        return [Array.from(document.querySelectorAll('article img:not(.as-drawn)')).map(i => {
                    const s = getComputedStyle(i); return [s.filter.includes('invert(1)'), s.mixBlendMode, s.backgroundColor]; }),
                Array.from(document.querySelectorAll('article figcaption p')).map(c => {
                    const s = getComputedStyle(c); return [s.color === text, Number(s.fontWeight) >= 400]; })];
    """)
    images, captions = seen
    assert images and set(map(tuple, images)) == {(True, "screen", "rgba(0, 0, 0, 0)")}
    assert captions and set(map(tuple, captions)) == {(True, True)}


# --- what every page of a part holds


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_the_workshop_say_so_and_no_others(book, page):
    notes = soup(book.html / f"{page}.html").select("article .admonition.workshop")
    assert len(notes) == (page in WORKSHOP)
    assert not notes or "may skip it" in notes[0].get_text()


def test_the_workshop_is_folded_in_the_sidebar(book):
    sidebar = soup(book.html / "nbs/index.html").select_one(".bd-sidebar-primary")
    for page in WORKSHOP[1:]:
        link = sidebar.select_one(f'a[href="{page.removeprefix("nbs/")}.html"]')
        folds = [part for part in link.parents if part.name == "details"]
        assert folds and not any(part.has_attr("open") for part in folds), page


def test_previous_and_next_follow_the_table_of_contents(book):
    for before, page in pairwise(PAGES):
        tree = soup(book.html / f"{page}.html")
        previous = tree.select_one("a.left-prev")
        assert previous["href"] == f"{before.removeprefix('nbs/')}.html", page


@pytest.mark.parametrize("page", PAGES)
def test_no_header_is_empty_and_no_name_contradicts_what_is_seen(book, page):
    article = soup(book.html / f"{page}.html").find("article")
    assert not [head for head in article.select("th") if not head.get_text(strip=True)]
    named = article.select("summary[aria-label], button[aria-label]")
    assert not [
        part
        for part in named
        if part.get_text(strip=True) and part.get_text(strip=True) not in part["aria-label"]
    ]


def test_the_local_script_and_style_load_nothing():
    for name in ("book.js", "book.css"):
        text = (ROOT / "nbs/_static" / name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|//\w+\.\w|@import|fetch\(|XMLHttpRequest|import\(", text)
