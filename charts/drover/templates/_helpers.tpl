{{/* Names are at most 63 characters, as labels are. */}}
{{- define "drover.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
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
{{ include "drover.commonLabels" . }}
{{- end -}}

{{/* Those of pods that are no operator. */}}
{{- define "drover.checkLabels" -}}
app.kubernetes.io/name: drover
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: check
{{ include "drover.commonLabels" . }}
{{- end -}}

{{- define "drover.commonLabels" -}}
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

{{/* The namespace in which requests are shown and tested. */}}
{{- define "drover.requests" -}}
{{- if .Values.tests.namespace -}}
{{- .Values.tests.namespace -}}
{{- else -}}
{{- first (default (list .Release.Namespace) .Values.watchNamespaces) -}}
{{- end -}}
{{- end -}}

{{/* Whether Helm can make objects of Drover's kinds together with everything else. */}}
{{- define "drover.hasDefinitions" -}}
{{- if .Capabilities.APIVersions.Has "drover.build/v1alpha1" }}yes{{ end -}}
{{- end -}}

{{/* A pod that runs `drover-operator check ARGS`; of a map with context, args and account. */}}
{{- define "drover.checkPod" -}}
{{- $values := .context.Values -}}
serviceAccountName: {{ .account }}
restartPolicy: Never
enableServiceLinks: false
{{- with $values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml $values.podSecurityContext | nindent 2 }}
containers:
  - name: check
    image: {{ include "drover.image" (dict "image" $values.image "appVersion" .context.Chart.AppVersion) }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args: {{- toYaml (concat (list "check") .args) | nindent 6 }}
    {{- with $values.extraEnv }}
    env: {{- toYaml . | nindent 6 }}
    {{- end }}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {memory: 64Mi}
    securityContext: {{- toYaml $values.securityContext | nindent 6 }}
    {{- with $values.extraVolumeMounts }}
    volumeMounts: {{- toYaml . | nindent 6 }}
    {{- end }}
{{- with $values.extraVolumes }}
volumes: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The class as the operator reads it from a file, where it watches only some namespaces. */}}
{{- define "drover.classFile" -}}
apiVersion: drover.build/v1alpha1
kind: BuilderClass
metadata: {name: {{ .Values.class.name }}}
spec: {{- toYaml .Values.class.spec | nindent 2 }}
{{- end }}

{{/* The port that a URL names, or its scheme's. */}}
{{- define "drover.urlPort" -}}
{{- $url := urlParse . }}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary 443 80 (eq $url.scheme "https")) }}
{{- end }}
