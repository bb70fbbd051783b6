"""What tests of pages share: a parser that sees what is markup, hostile texts, and a browser."""

import fcntl
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "]]>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "'`${document.title='pwned'}`&lt;&amp;&#60;",
    "{{ 7 * 7 }}{% raw %}",
    "nul\0esc\x1bdel\x7f",
    "\u202eevil\u2066",
    "\ud800 lone \udfff",
    "\u2028\u2029\ufeff",
    "</style></title></textarea>",
    "javascript:document.title='pwned'",
    "\n\t    def f(x):\r\n",
    " ",
    "",
    "🦊é漢",
]


class Page(HTMLParser):
    """Tags in order, attributes, and the text of scripts and styles; fails where tags do not nest."""

    VOID = frozenset(["meta", "link", "input", "img", "path", "circle"])

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.raw, self.open = [], [], {"script": [], "style": []}, []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in self.raw:
            self.raw[tag].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data


class Browser:
    """Headless chromium, driven over its debugging pipe (descriptors 3 and 4)."""

    START = (
        "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); "
        "os.execvp(sys.argv[3], sys.argv[3:])"
    )
    FLAGS = (
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ),
        *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
    )

    def __init__(self, profile):
        theirs, self.to = os.pipe()
        self.come, ours = os.pipe()
        pass_on = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, ours)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                self.START,
                *map(str, pass_on),
                "chromium",
                *self.FLAGS,
                f"--user-data-dir={profile}",
            ],
            pass_fds=pass_on,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs, ours, *pass_on):
            os.close(end)
        self.buffer, self.session, self.number, self.events = b"", {}, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.come)

    def read(self):
        while b"\0" not in self.buffer:
            part = os.read(self.come, 1 << 20)
            assert part, "the browser has gone"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        self.events.append(json.loads(message))
        return self.events[-1]

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        for address in ("about:blank", url):  # from a page to another of its anchors nothing would be loaded
            self.events.clear()
            loader = self.call("Page.navigate", url=address)["loaderId"]
            loaded = {"name": "load", "loaderId": loader}
            while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
                self.read()

    def run(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys):
        for key in keys:
            text = (
                {"text": key}
                if len(key) == 1
                else {"windowsVirtualKeyCode": {"ArrowDown": 40, "Enter": 13}[key]}
            )
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def complaints(self):
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]
