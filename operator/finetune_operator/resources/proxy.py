"""The proxy in front of a replica's engine and agent: nginx, with a list of what is let through, by method and path, letter by letter.

An engine's own doors (loading adapters, metrics, …) are open to whoever reaches it; so nobody but this does. Knows nothing of endpoints.
"""

from __future__ import annotations

from finetune_api.serving import AGENT_LOCAL_PORT, AGENT_PORT, ENGINE_LOCAL_PORT, MODELS_PATH, USER_PORT, ReplicaPaths

_ENGINE, _AGENT = f"http://127.0.0.1:{ENGINE_LOCAL_PORT}", f"http://127.0.0.1:{AGENT_LOCAL_PORT}"
_USERS = (
    ("POST", "/v1/chat/completions", _ENGINE),
    ("POST", "/v1/completions", _ENGINE),
    ("GET", "/v1/models", _ENGINE),
    ("GET", "/health", _AGENT),
)
"""What users may ask. Health is the agent's word: an engine whose answers are dead says that it is well."""
_OPERATOR = (("GET", MODELS_PATH, _AGENT), ("PUT", MODELS_PATH, _AGENT))
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def proxy_config(*, users: bool = True, user_body_bytes: int = 10 << 20, answer_seconds: int = 600) -> str:
    """nginx.conf. `users`: an engine stands beside the agent. `answer_seconds`: the longest silence of the engine within an answer.

    Writes to /tmp alone, keeps no body and logs none.
    """
    temporary = "".join(f"  {name}_temp_path /tmp/{name};\n" for name in _TEMPORARY)
    return f"""daemon off;
worker_processes 2;
pid /tmp/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  server_tokens off;
  default_type text/plain;
{temporary}  client_header_timeout 10s;
  client_body_timeout 30s;
  send_timeout 60s;
  keepalive_timeout 75s;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Authorization "";
  proxy_connect_timeout 5s;
  proxy_buffering off;
  proxy_request_buffering off;
  # compared as it was sent: no path that becomes another one by being decoded, merged or resolved
{_allowed("$for_users", _USERS) if users else ""}{_allowed("$for_operator", _OPERATOR)}{_for_users(user_body_bytes, answer_seconds) if users else ""}  server {{
    listen {AGENT_PORT} ssl;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate {ReplicaPaths.TLS}/tls.crt;
    ssl_certificate_key {ReplicaPaths.TLS}/tls.key;
    ssl_client_certificate {ReplicaPaths.TLS}/ca.crt;
    ssl_verify_client on;
    client_max_body_size {1 << 20};
    proxy_read_timeout 30s;
    if ($for_operator = 0) {{ return 404; }}
{_locations(_OPERATOR)}    location / {{ return 404; }}
  }}
}}
"""


def _for_users(body_bytes: int, answer_seconds: int) -> str:
    return f"""  server {{
    listen {USER_PORT};
    client_max_body_size {body_bytes};
    proxy_read_timeout {answer_seconds}s;
    if ($for_users = 0) {{ return 404; }}
{_locations(_USERS)}    location / {{ return 404; }}
  }}
"""


def _allowed(variable: str, routes: tuple[tuple[str, str, str], ...]) -> str:
    lines = "".join(f'    "{method} {path}" 1;\n' for method, path, _ in routes)
    return f'  map "$request_method $request_uri" {variable} {{\n    default 0;\n{lines}  }}\n'


def _locations(routes: tuple[tuple[str, str, str], ...]) -> str:
    """With the path that is asked: never what a client wrote."""
    targets = {path: upstream for _, path, upstream in routes}
    return "".join(f"    location = {path} {{ proxy_pass {upstream}{path}; }}\n" for path, upstream in targets.items())
