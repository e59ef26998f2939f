"""Who may see the page: everybody on this machine, or who brings the token; in both cases no page of another site."""
import hmac
import ipaddress
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE, QUERY = 'statekv_view', 'token'
# Vue compiles its templates in the browser, hence eval. Nothing may be loaded from, or sent to, anywhere else.
_SOURCES = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'")
_HEADERS = {'Content-Security-Policy': _SOURCES, 'X-Frame-Options': 'DENY', 'X-Content-Type-Options': 'nosniff',
            'Referrer-Policy': 'no-referrer'}


def make_token() -> str:
    """A new one: 192 random bits."""
    return secrets.token_urlsafe(24)


def is_this_machine(host: str) -> bool:
    """Whether who is bound to this address hears this machine only."""
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return host == 'localhost'


class Gate:
    """In front of all that is served, sockets included.

    Without a token only requests to this machine's own names pass: a name that somebody else's site points here does not. With one, a
    request needs it in its cookie; the address with `?token=...` sets that. A request that another site's page makes never passes.
    """

    def __init__(self, app: ASGIApp, token: str = ''):
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] not in ('http', 'websocket'):
            await self._app(scope, receive, send)
            return
        headers = {name.decode('latin-1').lower(): value.decode('latin-1') for name, value in scope['headers']}
        refusal = self._refusal(headers)
        given = parse_qs(scope.get('query_string', b'').decode('latin-1')).get(QUERY, [''])[0]
        if refusal:
            await self._refuse(scope, receive, send, refusal)
        elif self._token and scope['type'] == 'http' and given and self._fits(given):
            answer = RedirectResponse('/', status_code=303, headers=_HEADERS)       # so that it stays in no history
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite='strict', max_age=30 * 24 * 3600)
            await answer(scope, receive, send)
        elif self._token and not self._fits(_cookie(headers.get('cookie', ''))):
            await self._refuse(scope, receive, send, 'A token is needed: open the address that statekv-view printed at its start.')
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refusal(self, headers: dict[str, str]) -> str:
        host = headers.get('host', '')
        if not self._token and not is_this_machine(urlsplit(f'//{host}').hostname or ''):
            return f'This page is for this machine only: open it as http://127.0.0.1:<port>, not as {host[:100]!r}.'
        origin = headers.get('origin', '')
        if origin and urlsplit(origin).netloc != host:
            return 'This request comes from the page of another site.'
        return ''

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, sentence: str) -> None:
        if scope['type'] == 'websocket':
            await receive()
            await send({'type': 'websocket.close', 'code': 1008})
            return
        await PlainTextResponse(f'{sentence}\n', status_code=403, headers=_HEADERS)(scope, receive, send)


def _cookie(text: str) -> str:
    try:
        found = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ''
    return found.value if found is not None else ''


def _with_headers(send: Send) -> Send:
    async def sending(message) -> None:
        if message['type'] == 'http.response.start':
            message = message | {'headers': [*message['headers'], *((name.lower().encode(), value.encode())
                                                                    for name, value in _HEADERS.items())]}
        await send(message)
    return sending
