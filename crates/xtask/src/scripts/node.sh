# node.sh: everything that runs on the cluster's one node. Inside the node's root, network and process namespaces.
# Each program is started again when it ends, as an init system would; its log is /var/log/kube/NAME.log.
set -u
bin=/opt/kube
etc=/etc/kubernetes
pki=$etc/pki
log=/var/log/kube

busybox hostname node-0
# `dummy` links are not on every kernel: the node's address sits on a veth whose other end nobody uses.
ip link set lo up
ip link add node0 type veth peer name node0p
ip addr add 10.99.0.1/24 dev node0
ip link set node0 up
ip link set node0p up
ip route add default via 10.99.0.254 dev node0
# There is no cluster DNS: say so at once, instead of letting resolvers run into their timeouts.
ip route add unreachable 10.96.0.10/32
echo 1 >/proc/sys/net/ipv4/ip_forward

run() { # run NAME COMMAND...
	name=$1
	shift
	while :; do
		"$@" >>"$log/$name.log" 2>&1
		echo "node: $name ended with $?" >>"$log/node.log"
		sleep 0.2
	done &
}

run containerd containerd
run etcd etcd --data-dir /var/lib/etcd --unsafe-no-fsync \
	--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
	--listen-peer-urls http://127.0.0.1:2380
run apiserver $bin/kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
	--advertise-address=10.99.0.1 --bind-address=0.0.0.0 --secure-port=6443 \
	--tls-cert-file=$pki/apiserver.crt --tls-private-key-file=$pki/apiserver.key --client-ca-file=$pki/ca.crt \
	--service-account-key-file=$pki/sa.pub --service-account-signing-key-file=$pki/sa.key \
	--service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.96.0.0/16 \
	--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
	--kubelet-client-certificate=$pki/kubelet-client.crt --kubelet-client-key=$pki/kubelet-client.key \
	--kubelet-certificate-authority=$pki/ca.crt --kubelet-preferred-address-types=InternalIP \
	--audit-policy-file=$etc/audit.yaml --audit-log-path=$log/audit.log --audit-log-maxsize=1000
run controller-manager $bin/kube-controller-manager --kubeconfig=$etc/controller-manager.conf \
	--use-service-account-credentials --service-account-private-key-file=$pki/sa.key --root-ca-file=$pki/ca.crt \
	--cluster-signing-cert-file=$pki/ca.crt --cluster-signing-key-file=$pki/ca.key --leader-elect=false
run scheduler $bin/kube-scheduler --kubeconfig=$etc/scheduler.conf --leader-elect=false

until ctr version >/dev/null 2>&1; do sleep 0.1; done
ctr -n k8s.io image import /opt/pause.tar >>"$log/node.log" 2>&1
run kubelet $bin/kubelet --config=$etc/kubelet.yaml --kubeconfig=$etc/kubelet.conf --hostname-override=node-0 --node-ip=10.99.0.1
# The conntrack settings are read-only sysctls here: 0 means leave them alone.
run kube-proxy $bin/kube-proxy --kubeconfig=$etc/kube-proxy.conf --proxy-mode=nftables --hostname-override=node-0 \
	--cluster-cidr=10.98.0.0/16 --conntrack-max-per-core=0 --conntrack-min=0 \
	--conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
wait
