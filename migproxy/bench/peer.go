// What KubeVirt's migration proxy does, to be measured beside: crypto/tls with its settings, io.Copy both ways.
//
//	peer source SOCKET ADDRESS:PORT [FOLDER]   accepts at SOCKET, dials ADDRESS:PORT
//	peer target SOCKET ADDRESS:PORT [FOLDER]   accepts at ADDRESS:PORT, dials SOCKET
//
// With FOLDER, certificates as `migproxy certs` makes them, the connections between both are mTLS. As with KubeVirt's,
// the first end of stream closes both legs, the accepted one first; KubeVirt leaves the other to Go's garbage collector.
package main

import (
	"crypto/tls"
	"crypto/x509"
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

func configuration(role, folder string) *tls.Config {
	mine, use := "client", x509.ExtKeyUsageServerAuth
	if role == "target" {
		mine, use = "server", x509.ExtKeyUsageClientAuth
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(folder, mine, "tls.crt"), filepath.Join(folder, mine, "tls.key"))
	must(err)
	bundle, err := os.ReadFile(filepath.Join(folder, "ca.crt"))
	must(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	return &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    roots,
		// The certificates have no host names: the chain is verified by hand.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			leaf, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{use}})
			return err
		},
	}
}

func relay(accepted net.Conn, dial func() (net.Conn, error)) {
	dialled, err := dial()
	if err != nil {
		log.Print(err)
		accepted.Close()
		return
	}
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(accepted, dialled)
		ended <- err
	}()
	go func() {
		_, err := io.Copy(dialled, accepted)
		ended <- err
	}()
	<-ended
	accepted.Close()
	dialled.Close()
}

func main() {
	role, socket, address := os.Args[1], os.Args[2], os.Args[3]
	var config *tls.Config
	if len(os.Args) > 4 {
		config = configuration(role, os.Args[4])
	}
	var listener net.Listener
	var err error
	var dial func() (net.Conn, error)
	if role == "source" {
		listener, err = net.Listen("unix", socket)
		dial = func() (net.Conn, error) {
			if config != nil {
				return tls.Dial("tcp", address, config)
			}
			return net.Dial("tcp", address)
		}
	} else {
		listener, err = net.Listen("tcp", address)
		if config != nil && err == nil {
			listener = tls.NewListener(listener, config)
		}
		dial = func() (net.Conn, error) { return net.Dial("unix", socket) }
	}
	must(err)
	for {
		accepted, err := listener.Accept()
		must(err)
		go relay(accepted, dial)
	}
}
