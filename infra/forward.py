"""Carries connections from outside into the cluster: `python infra/forward.py DESCRIPTOR=HOST:PORT...`.

It runs on a host of the cluster and takes connections at sockets that listen outside, whose descriptors it
was given: a socket stays in the network in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

CHUNK = 65536


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()
    target.close()


async def _serve(listening: socket.socket, host: str, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()  # as a server does that is down
            return
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))

    await (await asyncio.start_server(connected, sock=listening)).serve_forever()


async def main(words: list[str]) -> None:
    """Serves all pairs until it is interrupted."""
    serving = []
    for word in words:
        descriptor, _, target = word.partition("=")
        host, _, port = target.rpartition(":")
        serving.append(_serve(socket.socket(fileno=int(descriptor)), host, int(port)))
    await asyncio.gather(*serving)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1:]))
