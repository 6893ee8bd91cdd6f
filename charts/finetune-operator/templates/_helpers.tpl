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
