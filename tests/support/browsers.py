"""A page in a real browser."""


def check_widths(browser, address: str) -> None:
    """No page is wider than its window, on a phone and on a desk; its pictures are shown and its scripts run."""
    for width in (400, 1400):
        page = browser.new_page(viewport={"width": width, "height": 800})
        errors = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto(address)
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (address, width)
        assert errors == [], address
        page.close()
