{{- define "finetune.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "finetune.labels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* No label of the operator's selector: its Service and its policies are not the gateway's. */ -}}
{{- define "finetune.gatewayLabels" -}}
app.kubernetes.io/name: finetune-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "finetune.gatewaySelector" -}}
app.kubernetes.io/name: finetune-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune.image" -}}
{{- $tag := .image.tag | default .appVersion -}}
{{- if hasPrefix "sha256:" $tag -}}{{ .image.repository }}@{{ $tag }}{{- else -}}{{ .image.repository }}:{{ $tag }}{{- end -}}
{{- end }}

{{- /* Webhooks are cluster-scoped: an operator of some namespaces has none unless cert-manager trusts it for us. */ -}}
{{- define "finetune.webhooks" -}}
{{- if and .Values.webhook.enabled (or (not .Values.watchNamespaces) .Values.webhook.certManager) -}}true{{- end -}}
{{- end }}

{{- define "finetune.clusterRole" -}}
{{- if or .Values.rbac.cluster (not .Values.watchNamespaces) -}}true{{- end -}}
{{- end }}

{{- /* What queues need has no namespace: an operator of some namespaces reads it by a ClusterRole, too. */ -}}
{{- define "finetune.seesQueues" -}}
{{- if or (not .Values.watchNamespaces) (and .Values.rbac.cluster .Values.rbac.queueing (eq .Values.queueing.backend "builtin")) -}}true{{- end -}}
{{- end }}

{{- /* A number of the values is a float: without care, a large one is written with an exponent. */ -}}
{{- define "finetune.quantity" -}}
{{- if kindIs "string" . -}}{{ . }}{{- else if eq (float64 .) (float64 (int64 .)) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end }}

{{- /* What a pattern in values.schema.json could say only by itself. */ -}}
{{- define "finetune.check" -}}
{{- $name := "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" -}}
{{- range .Values.watchNamespaces }}{{ include "finetune.fits" (list "watchNamespaces" . $name "a namespace, for example team-a") }}{{ end }}
{{- range without .Values.trainer.remoteCodeNamespaces "*" }}
{{- include "finetune.fits" (list "trainer.remoteCodeNamespaces" . $name "a namespace, for example team-a, nor \"*\" for all") }}
{{- end }}
{{- range .Values.trainer.allowedHosts }}
{{- include "finetune.fits" (list "trainer.allowedHosts" . "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$" "a host, for example minio.storage.svc, without scheme and port") }}
{{- end }}
{{- include "finetune.fits" (list "metrics.serviceMonitor.interval" .Values.metrics.serviceMonitor.interval "^[0-9]+(ms|s|m|h)$" "a duration, for example 30s") }}
{{- include "finetune.fits" (list "tracing.endpoint" .Values.tracing.endpoint "^(https?://.+)?$" "a URL, for example http://collector:4318/v1/traces") }}
{{- end }}

{{- define "finetune.fits" -}}
{{- if not (regexMatch (index . 2) (index . 1)) }}{{ fail (printf "%s: %q is not %s" (index . 0) (index . 1) (index . 3)) }}{{ end -}}
{{- end }}
