// A peer of another make: Go's crypto/tls, as KubeVirt's migration proxy uses it.
//
//	peer server|client ADDRESS FOLDER 1.2|1.3 echo|both
//
// echo: reads to the end of the stream, then sends everything back, and ends: needs the half-close.
// both: sends a mebibyte, then ends both directions at once, as KubeVirt's proxy does.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	role, address, folder, version, mode := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	pair, err := tls.LoadX509KeyPair(filepath.Join(folder, role, "tls.crt"), filepath.Join(folder, role, "tls.key"))
	must(err)
	bundle, err := os.ReadFile(filepath.Join(folder, "ca.crt"))
	must(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	number := map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}[version]
	config := &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   number,
		MaxVersion:   number,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    roots,
		// The certificates have no host names: as in KubeVirt, the chain is verified by hand.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			leaf, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			use := x509.ExtKeyUsageServerAuth
			if role == "server" {
				use = x509.ExtKeyUsageClientAuth
			}
			_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{use}})
			return err
		},
	}

	var connection *tls.Conn
	if role == "server" {
		listener, err := net.Listen("tcp", address)
		must(err)
		fmt.Println(listener.Addr().(*net.TCPAddr).Port)
		accepted, err := listener.Accept()
		must(err)
		connection = tls.Server(accepted, config)
	} else {
		dialled, err := net.Dial("tcp", address)
		must(err)
		connection = tls.Client(dialled, config)
	}
	must(connection.Handshake())

	if mode == "both" {
		_, err := connection.Write(make([]byte, 1<<20))
		must(err)
		must(connection.Close())
		return
	}
	everything, err := io.ReadAll(connection)
	must(err)
	_, err = connection.Write(everything)
	must(err)
	must(connection.CloseWrite())
	must(connection.Close())
}
