{{/* Names are at most 63 characters, as labels are. */}}
{{- define "drover.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "drover.serviceAccount" -}}
{{- default (include "drover.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "drover.selectorLabels" -}}
app.kubernetes.io/name: drover
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "drover.labels" -}}
{{ include "drover.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Image reference from a map with repository, tag and digest. */}}
{{- define "drover.image" -}}
{{- $tag := default .appVersion .image.tag -}}
{{- if .image.digest -}}
{{ printf "%s:%s@%s" .image.repository $tag .image.digest }}
{{- else -}}
{{ printf "%s:%s" .image.repository $tag }}
{{- end -}}
{{- end -}}

{{/* All addresses but those that no builder reaches, as NetworkPolicyPeers; of builder.networkPolicy. An address is excepted
from the range that it is in. */}}
{{- define "drover.publicAddresses" -}}
{{- $except4 := list }}
{{- $except6 := list }}
{{- range concat .except .apiServer }}
{{- if contains ":" . }}{{ $except6 = append $except6 . }}{{ else }}{{ $except4 = append $except4 . }}{{ end }}
{{- end }}
- ipBlock:
    cidr: 0.0.0.0/0
    {{- with $except4 }}
    except: {{- toYaml . | nindent 6 }}
    {{- end }}
- ipBlock:
    cidr: ::/0
    {{- with $except6 }}
    except: {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
