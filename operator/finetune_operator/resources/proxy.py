"""Settings of the nginx in front of a replica: what users may ask of the engine, and the operator of the agent. Nothing else gets through.

Knows nothing of any one endpoint.
"""

from __future__ import annotations

from finetune_api.serving import AGENT_LOCAL_PORT, AGENT_PORT, ENGINE_LOCAL_PORT, MODELS_PATH, USER_PORT, ReplicaPaths

_USER_PATHS = {"/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET"}
_HEALTH = {"/health": "GET"}
"""The agent's: an engine whose answers are dead says of itself that it is well."""
_BODY_LIMIT, _AGENT_BODY_LIMIT = "16m", "1m"
_ANSWER_SECONDS = 600
"""Between two parts of an answer."""


def nginx_conf() -> str:
    """The same for every endpoint. Each path is named in full on both sides: what nginx has normalized is what is passed on."""
    return f"""worker_processes auto;
pid /tmp/nginx.pid;
error_log /dev/stderr warn;
events {{ worker_connections 4096; }}
http {{
  # no prompts, no addresses
  access_log off;
  server_tokens off;
  default_type application/json;
  client_body_temp_path /tmp/nginx-body;
  proxy_temp_path /tmp/nginx-proxy;
  fastcgi_temp_path /tmp/nginx-fastcgi;
  uwsgi_temp_path /tmp/nginx-uwsgi;
  scgi_temp_path /tmp/nginx-scgi;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_buffering off;
  proxy_request_buffering off;
  proxy_read_timeout {_ANSWER_SECONDS}s;
  proxy_next_upstream off;
  upstream engine {{ server 127.0.0.1:{ENGINE_LOCAL_PORT} max_fails=0; keepalive 64; }}
  upstream agent {{ server 127.0.0.1:{AGENT_LOCAL_PORT} max_fails=0; keepalive 2; }}
  server {{
    listen {USER_PORT};
    client_max_body_size {_BODY_LIMIT};
{_locations(_USER_PATHS, "engine")}
{_locations(_HEALTH, "agent")}
    location / {{ return 404 '{{"error":{{"message":"not served here","type":"invalid_request_error","code":"not_found"}}}}'; }}
  }}
  server {{
    listen {AGENT_PORT} ssl;
    ssl_certificate {ReplicaPaths.TLS}/tls.crt;
    ssl_certificate_key {ReplicaPaths.TLS}/tls.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_client_certificate {ReplicaPaths.TLS}/ca.crt;
    ssl_verify_client on;
    client_max_body_size {_AGENT_BODY_LIMIT};
{_locations({MODELS_PATH: "GET PUT"}, "agent")}
    location / {{ return 404; }}
  }}
}}
"""


def _locations(paths: dict[str, str], upstream: str) -> str:
    return "\n".join(
        f"    location = {path} {{ limit_except {methods} {{ deny all; }} proxy_pass http://{upstream}{path}; }}"
        for path, methods in paths.items()
    )
