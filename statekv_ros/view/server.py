"""The web server: the page, pictures by camera and stamp, and nothing else of ours."""
import asyncio
import contextlib
import signal

from nicegui import app, background_tasks, ui
from nicegui.server import Server
from starlette.responses import Response

from statekv_ros.view.gate import Gate, is_this_machine, make_token
from statekv_ros.view.listener import Listener
from statekv_ros.view.page import Page
from statekv_ros.view.pictures import PICTURE, Pictures

_ICON = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1668dc"/>'
         '<path d="M7 21h4v-6h4v6h4V11h4v10h2" fill="none" stroke="#fff" stroke-width="2.4"/></svg>')


def serve(listener: Listener, host: str, port: int) -> int:
    """Until SIGINT or SIGTERM; returns the exit code. Prints the address to open."""
    token = '' if is_this_machine(host) else make_token()
    pictures = Pictures(listener.pictures)

    @app.get(PICTURE)
    async def picture(camera: str, at: int, within: float = 0.0) -> Response:
        """The picture nearest to a stamp (ns), at most so many seconds away (0: any); 404 with a sentence where there is none."""
        if not 0 <= at < 2**31 * 10**9 or not 0 <= within < 1e6:
            return Response('no such stamp', 404)
        found = await pictures.get(camera, at, within)
        if isinstance(found, str):
            return Response(found, 404, {'Cache-Control': 'no-store'}, 'text/plain')
        return Response(found, 200, {'Cache-Control': 'private, max-age=600'}, 'image/jpeg')

    @ui.page('/', title=f'{listener.state.memory} · statekv', favicon=_ICON)
    def page() -> None:
        Page(listener, pictures).build()

    app.add_middleware(Gate, token=token)
    shown = f'[{host}]' if ':' in host else host
    address = f'http://{shown}:{port}/' + (f'?token={token}' if token else '')

    async def tell() -> None:
        while not Server.instance.started:      # who reads the address may open it at once
            await asyncio.sleep(0.05)
        print(f'the page of {listener.state.memory}: {address}', flush=True)

    app.on_startup(lambda: background_tasks.create(tell()))
    # The server ends well at either signal, and then lets it act as it would without one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        ui.run(host=host, port=port, title='statekv', reload=False, show=False, show_welcome_message=False, tailwind=False,
               dark=None, reconnect_timeout=10.0, message_history_length=200, timeout_graceful_shutdown=1)
    return 0
