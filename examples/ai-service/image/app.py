"""The AI service of the example: slow to load, honest about its health, and able to misbehave on request."""

import asyncio
import hashlib
import os
import pathlib
import threading
import time

from fastapi import FastAPI, Response

LOAD_SECONDS = float(os.environ.get("MODEL_LOAD_SECONDS", "35"))
MOUNTS = ["/etc/ai/config", "/etc/ai/secret", "/etc/ai/pod"]

app = FastAPI()
started = time.monotonic()
hoard: list[bytearray] = []


@app.get("/healthz")
async def healthz(response: Response):
    """200 once the model is loaded, 503 before."""
    age = time.monotonic() - started
    if age < LOAD_SECONDS:
        response.status_code = 503
        return {"status": "loading", "seconds_left": round(LOAD_SECONDS - age, 1)}
    return {"status": "ok"}


@app.get("/predict")
async def predict(text: str = "hello"):
    """An answer that names the replica it comes from."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"pod": os.environ.get("POD_NAME", ""), "score": int(digest[:4], 16) / 65535}


@app.get("/settings")
async def settings():
    """What the node handed to this container: variables, and files with their modes."""
    files = {}
    for mount in map(pathlib.Path, MOUNTS):
        for path in sorted(mount.iterdir()) if mount.is_dir() else []:
            if path.is_file():
                files[str(path)] = {"mode": oct(path.stat().st_mode & 0o777), "text": path.read_text()}
    names = ["GREETING", "API_TOKEN", "POD_NAME", "POD_IP", "CPU_LIMIT", "MEMORY_LIMIT"]
    return {"env": {name: os.environ.get(name) for name in names}, "files": files}


@app.post("/deadlock")
async def deadlock():
    """Takes one lock twice on the thread of the event loop: nothing is answered any more."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@app.post("/leak")
async def leak():
    """Takes memory until the kernel says no."""

    def grow():
        while True:
            hoard.append(bytearray(b"x" * (4 << 20)))
            time.sleep(0.01)

    threading.Thread(target=grow, daemon=True).start()
    return {"leaking": True}


@app.post("/burn")
async def burn(seconds: float = 10):
    """Keeps one core busy, beside the event loop."""
    process = await asyncio.create_subprocess_exec(
        "timeout", str(seconds), "python3", "-c", "while True: pass"
    )
    return {"burning": process.pid}
